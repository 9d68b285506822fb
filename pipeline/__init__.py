"""Many models at once: fleets described by one YAML file each, trained, registered, scored."""
