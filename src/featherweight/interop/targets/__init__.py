"""One file for each program that is asked whether it runs a folder; its class carries `@register("target", NAME)`."""
