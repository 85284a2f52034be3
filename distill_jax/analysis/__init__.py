"""What traced functions show: one walk over their equations (`walk`) and the rules that use it."""
