"""What tests of several folders need: servers, browsers, small runs."""
