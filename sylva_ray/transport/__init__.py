"""What happens to uploads and answers between clients and coordinator: compression, attacks, counting of bytes."""
