"""The mathematics: one configurable Transformer core, three models composed from it, and their decoding."""
