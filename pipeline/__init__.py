"""Many models at once: one fleet of models, described by one YAML file, trained, registered and scored."""
