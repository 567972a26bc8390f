"""The nouns that all wings share: recipe, job, request, answer, shard, statistics, errors."""
