"""Tools for shards: pack, lint and inspect them."""
