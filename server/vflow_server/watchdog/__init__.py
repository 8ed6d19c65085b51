"""The watchdog: notices when a thread or a task that the service needs has ended, or stands still."""
