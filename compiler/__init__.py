"""From a Hugging Face model to an artifact: frontend, graph, plan, link."""

import os

# As ONNX Runtime comes it tells its makers of every use, and leaves a file; it looks here when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
