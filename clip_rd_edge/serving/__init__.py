"""An HTTP server for other programs: embeddings as llama.cpp and OpenAI give them, classification and search."""
