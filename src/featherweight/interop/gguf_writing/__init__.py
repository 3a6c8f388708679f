"""What a GGUF file is made of: types of blocks, names and metadata of architectures, vocabulary, the file itself."""
