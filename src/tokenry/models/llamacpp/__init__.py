"""Models that llama.cpp runs: its C functions, the file, and the shell that the rest of tokenry sees."""
