package ai.onnxruntime;

public enum OnnxJavaType { BOOL }
