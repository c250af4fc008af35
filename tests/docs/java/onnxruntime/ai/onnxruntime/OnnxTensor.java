package ai.onnxruntime;

import java.nio.ByteBuffer;
import java.nio.DoubleBuffer;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;

public abstract class OnnxTensor extends OnnxTensorLike {
  public static native OnnxTensor createTensor(OrtEnvironment env, Object data) throws OrtException;

  public static native OnnxTensor createTensor(OrtEnvironment env, String[] data, long[] shape) throws OrtException;

  public static native OnnxTensor createTensor(OrtEnvironment env, LongBuffer data, long[] shape) throws OrtException;

  public static native OnnxTensor createTensor(OrtEnvironment env, FloatBuffer data, long[] shape) throws OrtException;

  public static native OnnxTensor createTensor(OrtEnvironment env, DoubleBuffer data, long[] shape) throws OrtException;

  public static native OnnxTensor createTensor(OrtEnvironment env, ByteBuffer data, long[] shape, OnnxJavaType type)
      throws OrtException;

  @Override
  public native void close();
}
