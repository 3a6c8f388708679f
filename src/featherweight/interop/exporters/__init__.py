"""One file for each format that is written, whose class carries `@register("exporter", NAME)`."""
