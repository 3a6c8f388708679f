"""How text becomes tokens and back, for every command alike."""
