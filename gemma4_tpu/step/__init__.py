"""The one train step: loss, optimizer, update."""
