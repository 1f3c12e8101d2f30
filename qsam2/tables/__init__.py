"""Tables: many runs of one recipe with overrides, scored on the same sets, as Markdown in a document."""
