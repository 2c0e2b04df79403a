"""Writing a placement as another framework's own PEFT configuration: one pure file per target."""
