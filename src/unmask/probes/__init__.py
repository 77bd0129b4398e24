"""What each layer did, in numbers: one file a probe, each returns findings and knows nothing of pages."""
