"""One file for each format that is read, whose class carries `@register("importer", NAME)`."""
