"""From a Hugging Face model to an artifact: frontend, graph, plan, link."""
