"""Monitors how faithful the active strategy is on live turns, and searches for strategies that cost less."""
