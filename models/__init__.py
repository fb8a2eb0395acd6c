"""Networks: torch and timm only, no slides and no stores."""
