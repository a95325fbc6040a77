"""From a Hugging Face model to an artifact: frontend, graph, plan, link."""

import os
from pathlib import Path

# As ONNX Runtime comes it tells its makers of every use, and leaves a file; it looks here when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    Path.home()
except RuntimeError:  # a user whom the machine does not know, as containers have: TVM cannot even be imported
    os.environ["HOME"] = "/nonexistent"
