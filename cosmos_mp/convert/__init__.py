"""Weight files of other projects: NVIDIA's names and Hugging Face folders."""
