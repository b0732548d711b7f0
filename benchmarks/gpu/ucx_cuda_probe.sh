#!/bin/bash
# Builds and runs ucx_cuda_probe.c on the GPUs here (the owner on the first, the reader on the last). About 40 s.
# LIBUCX: folder of the installed libucx wheel; CUDA: the toolkit's. With HOST=1 the same on host memory, without CUDA.
here=$(cd "$(dirname "$0")" && pwd)
LIBUCX=${LIBUCX:-$(python3 -c 'import libucx; print(libucx.__path__[0])')}
CUDA=${CUDA:-/usr/local/cuda}
bin=$(mktemp -d)/probe
extra="-DCUDA -isystem $CUDA/include -L$CUDA/lib64 -L$CUDA/lib -lcudart -Wl,-rpath,$CUDA/lib64"
gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
[ "$HOST" = 1 ] && extra="" && gpus=1
gcc -O2 -isystem "$LIBUCX/include" "$here/ucx_cuda_probe.c" -o "$bin" "$LIBUCX"/lib/libuc{p,t,s,m}.so.0 \
  -Wl,-rpath,"$LIBUCX/lib" $extra || exit 1
last=$((gpus - 1))
export UCX_MEM_EVENTS=n UCX_CUDA_IPC_ENABLE_GET_ZCOPY=on UCX_RNDV_THRESH=inf UCX_WARN_UNUSED_ENV_VARS=n
[ "$HOST" = 1 ] && export UCX_NET_DEVICES=lo
all=posix,cma,cuda_copy,cuda_ipc,self,tcp
go() { echo "== $*"; timeout -k 1 12 env "${@:2}" "$bin" $1; rc=$?; [ $rc = 0 ] || echo "  exit status $rc"; }
short() { grep -v -E '^#  +(cm|.*am_|.*md_map|.*flags)' | grep -v -E '^# *$'; }
nvidia-smi topo -m 2>/dev/null | head -8
go "peer 0 $last speed" UCX_TLS=$all UCX_PROTO_INFO=y 2>&1 | short
go "none 0 $last speed" UCX_TLS=$all 2>&1 | grep -v '^#'
go "peer 0 $last speed" UCX_TLS=$all UCX_RNDV_THRESH=auto 2>&1 | grep -E '^(==|  get|peer|speed)'
for what in kill stop; do
  for mode in peer none; do go "$mode 0 $last $what" UCX_TLS=$all 2>&1 | grep -v '^#'; done
done
go "peer 0 $last kill" UCX_TLS=$all UCX_CUDA_IPC_CACHE=n 2>&1 | grep -v '^#'
[ "$HOST" = 1 ] || go "peer 0 $last ipc" UCX_TLS=$all 2>&1
[ "$gpus" -gt 1 ] && go "peer 0 0 speed" UCX_TLS=$all 2>&1 | grep -E '^(==|  get|  bytes|speed)'
exit 0
