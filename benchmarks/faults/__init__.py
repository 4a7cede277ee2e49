"""Training programs, healthy and faulty, on which the diagnosis is measured."""
