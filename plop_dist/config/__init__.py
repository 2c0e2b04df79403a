"""What the user asked for: one strict schema, checked before anything starts."""
