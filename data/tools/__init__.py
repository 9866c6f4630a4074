"""What a person does with shards: pack, check and look into them."""
