package com.google.gson;

import java.util.Iterator;

public final class JsonArray extends JsonElement implements Iterable<JsonElement> {
  public native void add(Number number);

  public native void add(JsonElement element);

  public native JsonElement get(int i);

  @Override
  public native Iterator<JsonElement> iterator();

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
