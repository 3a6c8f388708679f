"""How much each layer gets: allocators, which choose among candidates by bytes and by what these miss."""
