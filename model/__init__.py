"""The mathematics: one configurable Transformer core, four models composed from it, and their decoding."""
