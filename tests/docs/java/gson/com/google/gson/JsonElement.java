package com.google.gson;

public abstract class JsonElement {
  public abstract JsonObject getAsJsonObject();

  public abstract String getAsString();

  public abstract long getAsLong();

  public abstract double getAsDouble();

  public abstract float getAsFloat();

  public abstract boolean getAsBoolean();
}
