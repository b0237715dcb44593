"""Language models of the Llama architecture: network, key-value cache, and what quantization does to both."""
