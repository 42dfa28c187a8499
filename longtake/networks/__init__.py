"""The networks and what they share: slots, memory, rotary positions, mixers. No losses, no samplers."""
