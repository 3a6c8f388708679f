"""What a person asks for: compress, evaluate, analyse. Tasks put methods, models and storage together."""
