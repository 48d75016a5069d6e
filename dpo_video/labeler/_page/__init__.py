"""The labelling page: what raters see next, the pictures they see, and the server between."""
