"""A trained run as a model that others can load, merged or as a PEFT adapter, proven to be the one that was trained."""
