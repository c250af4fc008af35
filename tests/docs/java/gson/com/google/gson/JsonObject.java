package com.google.gson;

import java.util.Set;

public final class JsonObject extends JsonElement {
  public native void add(String property, JsonElement value);

  public native JsonElement get(String member);

  public native JsonArray getAsJsonArray(String member);

  public native JsonObject getAsJsonObject(String member);

  public native Set<String> keySet();

  @Override
  public native JsonObject getAsJsonObject();

  @Override
  public native String getAsString();

  @Override
  public native long getAsLong();

  @Override
  public native double getAsDouble();

  @Override
  public native float getAsFloat();

  @Override
  public native boolean getAsBoolean();
}
