"""The intermediate representation: op table, programs, the passes over them, and their interpreter."""
