"""Post-training quantization: float ONNX in, a quantized network out."""
