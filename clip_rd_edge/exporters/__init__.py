"""From a trained model to a bundle: ONNX, quantisation, parity."""
