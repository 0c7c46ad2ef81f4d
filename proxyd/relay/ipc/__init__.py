"""What control and a worker share: messages, their channel, counters in shared memory."""
