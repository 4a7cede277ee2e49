"""Programs that no threshold has been set on."""
