package ai.onnxruntime;

public abstract class OrtEnvironment {
  public static native OrtEnvironment getEnvironment();

  public abstract OrtSession createSession(String path) throws OrtException;
}
