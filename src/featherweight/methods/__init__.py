"""The methods: what papers propose. Tensors and statistics in, codes and tensors out; no files, no devices."""
