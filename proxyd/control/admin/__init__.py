"""The admin API: its server, the requests it understands, the views it answers with."""
