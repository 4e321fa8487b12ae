"""What copies and loads cost on a GPU, alone and under real vLLM."""
