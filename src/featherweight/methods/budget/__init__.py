"""How much each layer gets: allocators."""
