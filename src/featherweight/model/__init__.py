"""How a model is walked and run: products, layers, text, network, decoder."""
