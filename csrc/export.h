// Marks what a shared library exports; everything else is hidden.
#pragma once

#define ND_EXPORT extern "C" __attribute__((visibility("default")))
