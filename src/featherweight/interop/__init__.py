"""Other tools' formats: what reads them (`importers`), what writes them (`exporters`), who runs what (`targets`)."""
